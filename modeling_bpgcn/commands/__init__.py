"""Commands of `python -m modeling_bpgcn`: each module has `main(arguments)`."""
