"""Looking at a trained model: curves of a run, neighbors of a query."""
