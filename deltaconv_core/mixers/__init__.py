"""Token mixers other than ΔConvBlock that can stand at a site."""
