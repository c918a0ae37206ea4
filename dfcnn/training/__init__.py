"How a sequence of tasks is learned: batches, optimizer, evaluation, checkpoints."
