"""python -m lrds_fast is lrds-fast."""

import sys

from lrds_fast.train.cli import main

sys.exit(main())
