"Studies: runs and their records, metrics, figures, claims and their verdicts."
