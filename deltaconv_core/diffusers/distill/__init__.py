"""Distillation of diffusers models from a folder of pictures, on one GPU or many.

This is the command `python -m deltaconv_core distill`; the training itself is `deltaconv_core.distill`.
"""
