"""Device kit: a folder of models, samples and the code that checks them, for a device with numpy and one runtime."""
