"""The steps of `benchmarks.gpu`, each run by it in a process of its own; see there.

    python -m benchmarks.gpu_steps STEP FILE [--cpu]     # then a line with the time to end at, as time.time()

A case is a function that returns what is measured. Its row holds that, or the error that it raised.
"""
