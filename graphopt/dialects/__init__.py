"""Say, operator by operator, which axis rule applies and how size-bearing arguments follow a pruning."""
