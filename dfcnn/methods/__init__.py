"The networks of the paper, and the contract that they all keep."
