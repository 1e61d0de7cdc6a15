"""Learning against forgetting: adapters trained on one text domain, measured on its held-out text and on others'."""
