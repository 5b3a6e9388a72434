"""Where the runs of a study are carried out: processes of this machine, Ray, Slurm, or an executor of one's own found by entry point."""
