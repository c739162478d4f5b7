"""``python -m maskaq_brevitas`` is ``maskaq``."""

import sys

from maskaq_brevitas.cli import main

if __name__ == "__main__":
    sys.exit(main())
