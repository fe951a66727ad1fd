"""Beyond a single reward: several with weights, terms that need a group, a judge over the network, a cache."""
