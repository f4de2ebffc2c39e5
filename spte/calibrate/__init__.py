"""What this host's KVM costs: steps on /dev/kvm are timed, and solved for the items of a cost profile."""

from spte.calibrate.run import calibrate

__all__ = ["calibrate"]
