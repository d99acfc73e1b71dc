"""``python -m fastcl``: the doctor."""

import sys

from fastcl.doctor import main

sys.exit(main())
