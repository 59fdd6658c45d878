"""The models of the experiments: ordinary Pyro programs, one file each."""
