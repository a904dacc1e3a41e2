"""The demo: small pretrained networks that come with the installation."""
