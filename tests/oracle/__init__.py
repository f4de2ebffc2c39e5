"""A naive model of KVM: dictionaries, obvious, slow."""
