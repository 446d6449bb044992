"""python -m lrds_fast is lrds-fast."""

import sys

from lrds_fast.cli.main import main

sys.exit(main())
