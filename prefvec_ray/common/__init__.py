"""What every package uses, and that uses none of them: configs, errors, files, the cluster, progress, text."""
