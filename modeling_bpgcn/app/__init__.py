"""The web demo: answers, uploads and drawings that know nothing of the page, and the page."""
