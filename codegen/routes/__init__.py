"""One file for each way to compute a pattern together with the tensors that it joins."""
