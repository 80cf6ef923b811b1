"""Network families, one file each; `load.py` and `save.py` bring them in and out."""
