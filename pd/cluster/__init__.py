"""Ray: the only package that imports it.

Here are the settings that Ray reads from the environment when it is imported, so they come first.
"""

import os

# A local head writes a token file that would make a later one demand it: be explicit.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Keep CUDA_VISIBLE_DEVICES as it is for actors without a GPU.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray starts its workers at nice 15, behind all else on the host; ours are what the host is for.
os.environ.setdefault("RAY_worker_niceness", "0")
if "RAY_ADDRESS" not in os.environ:
    # A cluster of our own is for this host: it listens on loopback only (the name is Ray's).
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
