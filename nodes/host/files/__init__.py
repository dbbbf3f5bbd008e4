"""Weights in ComfyUI's model folders."""
