"""Looking at a MODEL's self-attention."""
