"""Token mixers that ΔConv is compared with."""
