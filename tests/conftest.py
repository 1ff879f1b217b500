"""One thread in each test process: two processes that each start a thread per core wait for one another."""

import torch

torch.set_num_threads(1)
