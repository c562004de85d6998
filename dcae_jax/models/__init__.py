# SPDX-License-Identifier: Apache-2.0
"""Networks; each file owns its variants, initial values and foreign weight names."""
