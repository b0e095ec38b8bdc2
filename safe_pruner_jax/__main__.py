"""`python -m safe_pruner_jax` is `openpi`."""

import sys

from safe_pruner_jax.cli.main import main

sys.exit(main())
