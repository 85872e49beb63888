"""`python -m easyspec_jax.cli`."""

import sys

from easyspec_jax.cli.main import main

sys.exit(main())
