// How functions that a host runs are marked for g++.
#pragma once

#define LF_HOST_DEVICE inline
