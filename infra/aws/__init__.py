"""The installation on AWS: the cluster's configuration, the function that starts runs for uploads."""
