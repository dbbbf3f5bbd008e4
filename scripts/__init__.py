"""Finds, starts and drives a real ComfyUI; commands are run as `python -m scripts.show_demo`."""
