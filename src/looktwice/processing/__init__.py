"""What goes into the network: images, videos, the chat template, the processor, packed rows."""
