"Studies: runs and their records, metrics, figures, verdicts."
