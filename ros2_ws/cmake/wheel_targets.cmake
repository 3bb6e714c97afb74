# Only for the ROS 2 wheels from PyPI (CMAKE_PROJECT_INCLUDE): their CMake exports name Python include directories of
# the machine the wheels were built on, and CMake stops at imported targets with paths that do not exist. On a normal
# ROS 2 installation nothing matches and nothing changes.
if(CMAKE_CURRENT_SOURCE_DIR STREQUAL CMAKE_SOURCE_DIR)
  function(_drop_wheel_build_directories)
    get_property(_targets DIRECTORY ${CMAKE_SOURCE_DIR} PROPERTY IMPORTED_TARGETS)
    foreach(_target IN LISTS _targets)
      get_target_property(_directories ${_target} INTERFACE_INCLUDE_DIRECTORIES)
      if(_directories)
        list(FILTER _directories EXCLUDE REGEX "^/opt/python/")
        set_target_properties(${_target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${_directories}")
      endif()
    endforeach()
  endfunction()
  # Deferred: the targets exist only after the package's find_package() calls.
  cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR} CALL _drop_wheel_build_directories)
endif()
