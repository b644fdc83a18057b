"""python -m benchmarks.gpu_check [--device cuda|cpu] [--tiny] [--minutes 12] [--sections NAME …] [--out FOLDER]"""

import sys

from benchmarks.gpu_check.runner import main

if __name__ == "__main__":
    sys.exit(main())
