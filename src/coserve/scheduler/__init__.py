"""Policy on integers, without tensors: blocks and prefixes, deadlines, predicted times, units, fair shares."""
