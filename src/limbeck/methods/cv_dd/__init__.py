"""Images and labels by a committee of networks whose votes weigh as much as what they distil is worth."""
