"""The kubelet's device plugin API: ``deviceplugin.proto``, and what ``make stubs`` generates from it."""
