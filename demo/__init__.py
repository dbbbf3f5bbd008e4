"""The bundled demonstration: pictures drawn by code, the words that describe them, and a small model
trained on them.

Nothing in this package needs ComfyUI except the scripts that train and evaluate the model.
"""
