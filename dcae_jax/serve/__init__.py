# SPDX-License-Identifier: Apache-2.0
"""Commands for one's own images, without a configuration file, and the comparison page."""
