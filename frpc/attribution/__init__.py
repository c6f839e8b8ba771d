"""Methods that ask an explainer several times: averages, masks, class activation maps."""
