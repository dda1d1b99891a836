"""A worker that hangs the first time, before it has got as far as its loop; the second time it is the scripted one.

Its first argument is a file that tells the two times apart.
"""

import runpy
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    been_here = Path(sys.argv.pop(1))
    if not been_here.exists():
        been_here.touch()
        time.sleep(600)
    runpy.run_path(str(Path(__file__).with_name("scripted_worker.py")), run_name="__main__")
