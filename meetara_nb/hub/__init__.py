"""The Intelligence Hub: training data from a domain's statements, with an honest funnel."""
