import os

import torch

# the networks here are so small that threads only wait for each other
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
