"""What tests and benchmarks share: small models, files, a server that misbehaves. It is not shipped."""
