"""The 14 patches of the 2021 series, each measured without and with its one decision."""
