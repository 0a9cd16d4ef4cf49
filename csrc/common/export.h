// What Python's ctypes calls by name.
#pragma once

#if defined(_MSC_VER)
#define FASTCL_EXPORT __declspec(dllexport)
#else
#define FASTCL_EXPORT __attribute__((visibility("default")))
#endif
