"""One file per node or kind of node, and what they share: `places` names files, `running` shares the machine."""
