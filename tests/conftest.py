"""One thread for each process of the tests: two at a time run on two cores, and many start more of their own."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
