"""Who may ask for what: admission, keys, policies, rates, the audit."""
