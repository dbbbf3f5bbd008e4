"""Distilling a MODEL in ComfyUI."""
